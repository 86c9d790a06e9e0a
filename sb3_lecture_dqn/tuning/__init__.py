"""
Tuning that survives its workers: what ``python -m sb3_lecture_dqn.tune`` and the zoo's ``-optimize`` share, and the engine.

- :mod:`~sb3_lecture_dqn.tuning.scoring`: what a trial is worth
- :mod:`~sb3_lecture_dqn.tuning.storage`: where a study lives
- :mod:`~sb3_lecture_dqn.tuning.studies`: which study it is, and whose trials are lost
- :mod:`~sb3_lecture_dqn.tuning.driver`: runs a study on an engine
- :mod:`~sb3_lecture_dqn.tuning.engine`: the engine, Ray
- :mod:`~sb3_lecture_dqn.tuning.report`: what a study leaves behind: tables, plots, a yml entry

Only the engine imports Ray, an optional extra.
"""
