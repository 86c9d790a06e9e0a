"""
The same algorithm, faster.

``lecture_dqn.py`` enters here in two places: ``_fast_gradient_steps`` for the update (``update.py``), ``_greedy_actions`` for
the acting (``acting.py``). ``compiled_update.py`` is the update that Numba compiles, by ``kernels.py``, which read the replay
buffer by ``stored_transitions.py``; ``second_thread.py`` is who helps. On a CUDA device both are in ``graph.py``, and
``replay_buffer.py`` keeps what ``device_copy.py`` has there.
"""
