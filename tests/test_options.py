"""Options are checked where they are given."""

import dataclasses

import numpy as np
import pytest

import pcr_fx


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fast"}, "solver='fast' is not allowed; it must be one of 'auto', 'newton', 'quasi-newton', "),
        ({"linear_solver": "lu"}, "linear_solver='lu' is not allowed"),
        ({"on_failure": "ignore"}, "must be one of 'fallback', 'raise'"),
        ({"tolerance": 0}, "tolerance=0 is not allowed; it must be a positive number or None"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"tolerance": "1e-3"}, "tolerance='1e-3'"),
        ({"tolerance": 10**400}, "it must be a positive number or None"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"max_iterations": 2.5}, "max_iterations=2.5"),
        ({"max_iterations": True}, "max_iterations=True"),
        ({"min_length": 1}, "min_length=1 is not allowed; it must be a whole number >= 2"),
        ({"min_length": None}, "min_length=None"),
        ({"inner_backend": 3}, "inner_backend=3"),
        ({"inner_backend": "deeppcr"}, "other than 'deeppcr' itself"),
        ({"tolerence": 1e-3}, "unknown option 'tolerence'; valid options are solver, linear_solver, tolerance"),
    ],
)
def test_bad_options_say_what_is_allowed(options: dict, message: str) -> None:
    with pytest.raises(pcr_fx.OptionError) as caught:
        pcr_fx.Options.of(options)
    assert message in str(caught.value)


def test_numbers_of_other_libraries_are_kept_as_pythons_own() -> None:
    options = pcr_fx.Options(tolerance=np.float32(0.5), max_iterations=np.int64(3), damping=1)
    assert options == pcr_fx.Options(tolerance=0.5, max_iterations=3)
    assert [type(value) for value in (options.tolerance, options.max_iterations, options.damping)] == [
        float,
        int,
        float,
    ]


def test_forms() -> None:
    options = pcr_fx.Options(solver="newton")
    assert pcr_fx.Options.of(options) is options
    assert pcr_fx.Options.of({"solver": "newton"}) == options
    assert pcr_fx.Options.of(None) == pcr_fx.Options()
    with pytest.raises(pcr_fx.OptionError, match="got list"):
        pcr_fx.Options.of(["solver"])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.solver = "auto"  # type: ignore[misc]
