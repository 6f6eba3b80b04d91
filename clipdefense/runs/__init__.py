"""Runs: models x defences x datasets x threat models, in work units that survive a kill, and what is read off them.

:mod:`config` is what is asked for, :mod:`run` does it, :mod:`store` keeps it; :mod:`results`, :mod:`verify`,
:mod:`compare` and :mod:`merge` work on what is kept.
"""
