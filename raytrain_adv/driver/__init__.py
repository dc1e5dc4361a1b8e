"""What runs once, next to the cluster; the only part that imports ray."""
