"""
The same algorithm, faster on a CPU.

``lecture_dqn.py`` enters here in two places: ``_fast_gradient_steps`` for the update, ``_greedy_actions`` for the acting.
"""
