import pytest

from hasten.errors import UserError
from hasten.model.imported import Huggingface


def test_a_number_of_tokens_to_compare_is_none_or_more() -> None:
    assert Huggingface(verify_tokens=0).verify_tokens == 0
    with pytest.raises(UserError, match=r"model\.verify_tokens must be 0 \(no comparison\) or more, got -1"):
        Huggingface(verify_tokens=-1)
