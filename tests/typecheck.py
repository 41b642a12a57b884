"""What checks types while the tests run: `pytest --jaxtyping-packages=dalle,typecheck.beartype`.

A whole number is a float, as PEP 484 has it and as every other type checker does.
"""

from beartype import BeartypeConf
from beartype import beartype as plain

beartype = plain(conf=BeartypeConf(is_pep484_tower=True))
