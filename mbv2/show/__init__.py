"""What people see of a run: curves and the report."""
