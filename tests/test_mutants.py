"""Each mutant of `make mutants` changes one place of the code as it is."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_has_its_one_place(name):
    file, text, mutation = MUTANTS[name]
    assert (ROOT / file).read_text().count(text) == 1 and text != mutation
