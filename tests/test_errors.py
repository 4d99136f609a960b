from __future__ import annotations

import inspect

import pytest

from fedlora import errors
from fedlora.errors import FedloraError

EXIT_CODES = {
    "FedloraError": 1,
    "InputError": 2,
    "ConfigError": 2,
    "DataError": 2,
    "ModelError": 2,
    "RunFolderError": 2,
    "PrivacyError": 3,
    "BudgetRefused": 3,
    "AdapterError": 1,
    "ProtocolError": 1,
}
CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_exit_codes_are_those_of_the_contract() -> None:
    found = {name: kind.exit_code for name, kind in CLASSES.items()}
    assert EXIT_CODES.items() <= found.items()
    assert set(found.values()) <= {1, 2, 3, 4, 130}


@pytest.mark.parametrize("name", CLASSES)
def test_one_except_clause_catches_everything_deliberate(name: str) -> None:
    assert issubclass(CLASSES[name], FedloraError)
    assert str(CLASSES[name]("what, got, wanted")) == "what, got, wanted"
    assert name in (errors.__doc__ or "")


def test_a_bad_config_is_a_value_error_too() -> None:
    assert issubclass(errors.ConfigError, ValueError)
