"""Verify, repair and adopt records folders."""
