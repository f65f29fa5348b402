"""The paper's rows as jobs that depend on each other (launch/reproduce.py)."""
