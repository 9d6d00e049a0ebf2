from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation.control_groups import parse, trees
from tests.evaluation.trees import write

BOTH = "9:memory:/x\n3:cpu,cpuacct:/docker/1f\n1:cpuset:/\n0::/docker/1f\n"


@given(st.text())
def test_any_text_is_read(text):
    assert isinstance(parse(text), list)


def test_the_controller_s_own_tree_comes_before_the_common_one(tmp_path):
    root = tmp_path / "sys/fs/cgroup"
    found = trees("cpu", write(tmp_path, {"proc/self/cgroup": BOTH}))
    assert [tree[0] for tree in found] == [
        root / mount / "docker/1f" for mount in ("cpu,cpuacct", "cpu", ".", "unified")
    ]
    assert found[0] == [root / "cpu,cpuacct" / part for part in ("docker/1f", "docker", ".")]
    assert trees("memory", tmp_path)[0][0] == root / "memory/x"


@pytest.mark.parametrize("path", ["/", "/../../elsewhere"])
def test_what_cannot_be_seen_from_here_is_told_at_the_root(tmp_path, path):
    root = tmp_path / "sys/fs/cgroup"
    found = trees("memory", write(tmp_path, {"proc/self/cgroup": f"0::{path}\n"}))
    assert found == [[root], [root / "unified"]]


def test_without_control_groups_there_are_none(tmp_path):
    assert trees("cpu", tmp_path) == []
    assert isinstance(trees("cpu", Path("/")), list)
