"""Results: read as written, found again, and marked where they do not compare."""

import json
import math

import pytest

from dalle.errors import UserError
from dalle.evaluation.results import FILE, Result, find, flat, marks, publish, workplace
from dalle.metrics.intervals import Figure


def result(guidance=1.0, pictures=100, **more) -> Result:
    target = {"kind": "unclip", "weights": {"decoder": "abc"}, "paths": {"decoder": "logs/x/decoder"},
               "options": {"decoder": {"guidance": guidance}}}  # fmt: skip
    protocol = {"pictures": pictures, "real_pictures": 100, "features": {"network": "clip", "weights": "123"}}
    return Result(target, protocol, ["fid"], {"fid_clip": Figure(3.0, 2.0, 4.0)}, **more)


def written(folder, some):
    folder.mkdir(parents=True)
    (folder / FILE).write_text(some.to_json())
    return folder


def test_read_as_written(tmp_path):
    first = result(notes=["a note"], parameters={"decoder": 7})
    again = Result.read(written(tmp_path / "001", first))
    assert again.figures == {"fid_clip": Figure(3.0, 2.0, 4.0)}
    assert (again.id, again.protocol_id, again.notes, again.parameters) == (
        first.id,
        first.protocol_id,
        ["a note"],
        {"decoder": 7},
    )
    assert again.path == tmp_path / "001"


def test_what_is_no_number_comes_back(tmp_path):
    broken = result()
    broken.figures["kid"] = Figure(math.nan, math.nan, math.nan)
    assert math.isnan(Result.read(written(tmp_path / "001", broken)).figures["kid"].value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 99}', '{"schema": 1, "figures": {"fid": 3}}'])
def test_damaged_results_are_one_line(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=r"result.json (cannot be read|is damaged|was written by)"):
        Result.read(tmp_path)
    assert find(tmp_path.parent, result()) is None


def test_the_same_is_found_wherever_its_runs_lie(tmp_path):
    written(tmp_path / "001", result(2.0))
    written(tmp_path / "002", result())
    moved = result()
    moved.target["paths"] = {"decoder": "elsewhere"}
    assert find(tmp_path, moved) == tmp_path / "002"
    assert find(tmp_path, result(3.0)) is None
    assert find(tmp_path, result(pictures=99)) is None


def test_numbers_are_given_in_order_and_replaced_only_where_told(tmp_path):
    for k, taken in enumerate([None, None, tmp_path / "001"]):
        work = written(workplace(tmp_path, result(float(k))), result(float(k)))
        publish(work, tmp_path, taken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["001", "002"]
    assert json.loads((tmp_path / "001" / FILE).read_text())["id"] == result(2.0).id


def test_other_protocols_bear_signs_that_say_what_is_different():
    others = [result(), result(2.0), result(pictures=50), result(3.0, pictures=50), result(pictures=10)]
    signs, lines = marks(others)
    assert signs == ["", "", "*", "*", "†"]
    assert lines == [
        "* measured by another protocol, not to be compared: pictures is 50 instead of 100",
        "† measured by another protocol, not to be compared: pictures is 10 instead of 100",
    ]
    assert marks([]) == ([], [])


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}
