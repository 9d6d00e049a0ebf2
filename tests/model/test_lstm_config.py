from __future__ import annotations

from typing import Any

import pytest

from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.lstm_config import LstmConfig
from hasten.model.shape import read_shape, write_shape
from tests.tiny import lstm_shape, shape

IDS = {"bos_id": 0, "eos_id": 1, "pad_id": None}


@pytest.mark.parametrize(
    "config",
    [
        lstm_shape(),
        lstm_shape(layers=1, embedding_size=24, tied_head=False, initializer_range=0.05, context=7),
        lstm_shape(embedding_size=32),
    ],
)
def test_a_shape_survives_its_config_json(config: LstmConfig) -> None:
    written = write_shape(config, **IDS)
    assert written["model_type"] == "hasten_lstm"
    assert (written["eos_token_id"], written["pad_token_id"]) == (1, None)
    read = read_shape(written)
    assert isinstance(read, LstmConfig)
    assert (read.input_width, read.hidden_size, read.layers) == (config.input_width, config.hidden_size, config.layers)
    assert write_shape(read, **IDS) == written


def test_a_decoder_is_still_read_as_one() -> None:
    assert isinstance(read_shape(write_shape(shape(), **IDS)), ModelConfig)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"hidden_size": 0}, "model.hidden_size must be at least 1, got 0"),
        ({"context": 1}, "model.context must be at least 2, got 1"),
        ({"embedding_size": -1}, "model.embedding_size must be 0 (hidden_size) or more, got -1"),
        ({"embedding_size": 16}, "must be 0 or model.hidden_size (32) where model.tied_head is true, got 16"),
        ({"vocab_size": -1}, "model.vocab_size must be 0 (the tokenizer's) or more, got -1"),
        ({"initializer_range": float("nan")}, "model.initializer_range must be 0 or more and finite, got nan"),
    ],
)
def test_options_are_checked_at_the_door(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        lstm_shape(**options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_hidden_layers": "2"}, "config.json: num_hidden_layers must be a whole number from 0 to"),
        ({"vocab_size": True}, "config.json: vocab_size must be a whole number from 0 to 2147483647, got True"),
        ({"hidden_size": 2**40}, "config.json: hidden_size must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings must be true or false, got 'yes'"),
        ({"initializer_range": []}, "config.json: initializer_range must be a number, got []"),
        ({"embedding_size": 5}, "model.embedding_size must be 0 or model.hidden_size"),
    ],
)
def test_a_malformed_config_json_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        read_shape({**write_shape(lstm_shape(), **IDS), **changes})
    assert words in str(error.value)
