"""What changes between the workers that are wanted and those that are there: all that is needed, nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.proto import worker_pb2
from tandem.router.fleet.reconcile import Changes, reconcile
from tandem.router.fleet.sources import Target

TARGETS = st.builds(
    Target,
    st.sampled_from([worker_pb2.ROLE_DECODE, worker_pb2.ROLE_PREFILL]),
    st.sampled_from([f"10.0.0.{number}:9200" for number in range(5)]),
)


def after(present: dict[Target, bool], changes: Changes) -> dict[Target, bool]:
    """`present` once the changes are made; a leaving worker is still there."""
    return (
        present
        | dict.fromkeys(changes.come, False)
        | dict.fromkeys(changes.leave, True)
        | dict.fromkeys(changes.stay, False)
    )


@given(st.frozensets(TARGETS), st.dictionaries(TARGETS, st.booleans()))
def test_the_changes_lead_to_what_is_wanted_and_touch_nothing_twice(
    wanted: frozenset[Target], present: dict[Target, bool]
) -> None:
    changes = reconcile(wanted, present)
    then = after(present, changes)
    assert {target for target, leaving in then.items() if not leaving} == wanted
    touched = [*changes.come, *changes.leave, *changes.stay]
    assert len(touched) == len(set(touched))
    assert not present.keys() & set(changes.come)
    assert present.keys() >= {*changes.leave, *changes.stay}
    for target, leaving in present.items():
        assert (target in touched) == (leaving == (target in wanted)), "only what is not as it should be changes"
    assert reconcile(wanted, then) == Changes()


@given(st.frozensets(TARGETS), st.lists(st.frozensets(TARGETS), max_size=4))
def test_whatever_was_wanted_meanwhile_only_the_last_word_counts(
    last: frozenset[Target], meanwhile: list[frozenset[Target]]
) -> None:
    present: dict[Target, bool] = {}
    for wanted in [*meanwhile, last]:
        present = after(present, reconcile(wanted, present))
    assert {target for target, leaving in present.items() if not leaving} == last
