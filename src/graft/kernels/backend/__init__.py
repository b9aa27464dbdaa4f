"""What every family of operations shares: declaration, registry, the native library, Triton."""
