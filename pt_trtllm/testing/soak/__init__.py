"""Mixed requests and faults against a real server, and what must hold afterwards (`scripts/soak.py`)."""
