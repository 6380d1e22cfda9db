"""What a device has and can run: data only."""
