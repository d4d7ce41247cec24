"""The `[engine]` table: every mistake is named."""

import pytest

from engine.config import ConfigError, load_config


def write(tmp_path, text):
    path = tmp_path / "loraland.toml"
    path.write_text(text)
    return path


def test_defaults_and_a_model_path_relative_to_the_file(tmp_path):
    config = load_config(write(tmp_path, '[engine]\nmodel = "weights.gguf"\nname = "tiny"\n'))
    assert config.model == str(tmp_path / "weights.gguf")
    assert config.port == 8100 and config.prefix_caching


@pytest.mark.parametrize("model", ["package:x", "hf://org/name@main"])
def test_a_package_and_a_model_of_the_hub_are_no_paths(tmp_path, model):
    assert load_config(write(tmp_path, f'[engine]\nmodel = "{model}"\nname = "t"\n')).model == model


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[engine]\nname = "t"\n', "model"),
        ('[engine]\nmodel = "m"\nname = "t"\nprot = 1\n', "prot"),
        ('[engine]\nmodel = "m"\nname = "t"\ndtype = "int3"\n', "dtype"),
        ('[engine]\nmodel = "m"\nname = "t"\nport = 70000\n', "port"),
        ('[engine]\nmodel = "m"\nname = "t"\nkv_cache_mib = 0\n', "kv_cache_mib"),
        ('[engine]\nmodel = "m"\nname = "t"\nmax_batch_tokens = 8\n', "max_sequences"),
        ('[engine]\nmodel = "m"\nname = "t"\nadapter_slots = 1\nadapter_pinned = ["a"]\n', "adapter_pinned"),
        ("[gateway]\n", r"\[engine\]"),
        ("[engine\n", "loraland.toml"),
    ],
)
def test_a_mistake_names_the_key(tmp_path, text, named):
    with pytest.raises(ConfigError, match=named):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")
