"""Show what a records folder holds: info, report and browse."""
