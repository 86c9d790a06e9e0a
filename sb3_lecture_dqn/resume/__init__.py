"""
Runs that cannot be lost: checkpoints of everything that a training knows, and what brings it back bit for bit.

``checkpoints.py`` has the callback; ``docs/resume.md`` says what is covered.
"""
