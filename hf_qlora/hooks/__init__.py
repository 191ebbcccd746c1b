"""What the wrapped functions of PEFT and transformers do for our configs; for stock ones, what they did.

Each takes the function that it stands in for first. `registration.py` says which that is, and why it is wrapped.
"""
