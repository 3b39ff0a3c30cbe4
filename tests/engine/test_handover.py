"""How the groups of an optimizer are put together, where workers have others."""

from hf_sdp.engine.handover import _names_by_group

DECAY, NONE = {"weight_decay": 0.1}, {"weight_decay": 0.0}


def test_groups_that_are_the_same_on_all_workers_stay():
    """Also two of equal options: a schedule may treat them differently later."""
    mine, theirs = [(DECAY, ["a"]), (DECAY, ["n"])], [(DECAY, ["c"]), (DECAY, ["n"])]
    assert _names_by_group(mine, [mine, theirs]) == [{"a", "c"}, {"n"}]


def test_groups_that_were_made_for_meshes_are_put_together():
    """A parameter that is held in two parts is in a group of each, and must be trained once."""
    mine = [(DECAY, ["a", "b"]), (DECAY, ["b", "c"]), (NONE, ["n"])]
    theirs = [(DECAY, ["a", "d"]), (NONE, ["n"])]
    everyone = [mine, theirs]
    assert _names_by_group(mine, everyone) == [{"a", "b", "c", "d"}, set(), {"n"}]
    assert _names_by_group(theirs, everyone) == [{"a", "b", "c", "d"}, {"n"}]


def test_a_parameter_in_other_groups_of_equal_options_on_other_workers_is_trained_once():
    mine, theirs = [(DECAY, ["a"]), (DECAY, ["b"])], [(DECAY, ["b"]), (DECAY, ["a"])]
    assert _names_by_group(mine, [mine, theirs]) == [{"a", "b"}, set()]
