"""What a records folder holds, for people: info, report, browse."""
