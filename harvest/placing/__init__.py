"""Where a teacher's networks go: pure arithmetic over sizes, machine and wish."""
