"""A folder for OpenVINO."""
