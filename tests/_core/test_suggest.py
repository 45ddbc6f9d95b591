from penstock._core.suggest import unknown_name


def test_a_near_miss_is_pointed_out() -> None:
    text = unknown_name("algorithm", "onebt", ["none", "onebit"])
    assert text == "unknown algorithm 'onebt'; did you mean 'onebit'? Known: none, onebit"


def test_nothing_near_lists_what_there_is() -> None:
    assert unknown_name("key", "xyz", ["b", "a"]) == "unknown key 'xyz'. Known: a, b"
    assert unknown_name("key", "xyz", []) == "unknown key 'xyz'. Known: (none)"


def test_of_very_many_names_the_first_are_listed() -> None:
    names = [f"layer {number:03}" for number in range(100)]
    text = unknown_name("module", "xyz", names)
    assert text == f"unknown module 'xyz'. Known: {', '.join(names[:30])}, ... and 70 more"
