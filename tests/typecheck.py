"""Configures the run-time type checker of the tests, beartype, to accept an int as a float as type checkers do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
