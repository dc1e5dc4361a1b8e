"""What a run leaves behind: report.json for scripts, report.html for people."""
