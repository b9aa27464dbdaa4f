"""Training contenders, scoring what each deploys, and showing them side by side."""
