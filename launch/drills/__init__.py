"""What drill.py injects faults into, and how."""
