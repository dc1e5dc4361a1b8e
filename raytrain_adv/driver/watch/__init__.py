"""What the driver watches while workers train."""
