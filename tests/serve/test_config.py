"""Model configurations: read as protobuf text, completed, checked."""

from __future__ import annotations

import pytest

from venturi.serve.config import backend_of, config_from_json, message_json, normalise, parse_config
from venturi.serve.errors import ServeError


def made(text, name="m"):
    return normalise(parse_config(text, "config.pbtxt"), name, backend="venturi")


def test_defaults_are_written_out():
    data = message_json(made("max_batch_size: 8 dynamic_batching { }"))
    assert data["name"] == "m"
    assert data["backend"] == "venturi"
    assert data["version_policy"] == {"latest": {"num_versions": 1}}
    assert data["dynamic_batching"]["preferred_batch_size"] == [8]
    assert data["instance_group"][0]["count"] == 1
    assert data["instance_group"][0]["kind"] == "KIND_CPU"


def test_numbers_are_numbers_and_maps_have_string_keys():
    text = 'max_batch_size: 4 dynamic_batching { max_queue_delay_microseconds: 100 priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 2 value { max_queue_size: 3 } } } parameters { key: "a" value { string_value: "b" } }'  # fmt: skip
    data = message_json(made(text))
    assert data["dynamic_batching"]["max_queue_delay_microseconds"] == 100
    assert data["dynamic_batching"]["priority_queue_policy"]["2"]["max_queue_size"] == 3
    assert data["parameters"] == {"a": {"string_value": "b"}}
    assert config_from_json(data, "json") == made(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_batch_size: -1", "must be non-negative"),
        ("max_batch_size: x", "cannot read the model configuration config.pbtxt: 1:17"),
        ("nonsense: 1", 'has no field named "nonsense"'),
        ('name: "other"', "unexpected directory name 'm' for model 'other'"),
        ('input { data_type: TYPE_FP32 dims: 1 }', "must specify 'name'"),
        ('input { name: "x" dims: 1 }', "must specify 'data_type'"),
        ('input { name: "x" data_type: TYPE_FP32 dims: -2 }', "dims [-2]"),
        ('input { name: "x" data_type: TYPE_FP32 } input { name: "x" data_type: TYPE_FP32 }', "listed twice"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "lists gpus"),
        ("instance_group { count: -1 }", "count -1"),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 5 }", "preferred size"),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 0 }", "preferred size"),
        ("max_batch_size: 4 dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "must be in [1, 2]"),
        ("max_batch_size: 4 dynamic_batching { default_priority_level: 1 }", "priority_levels"),
        ("max_batch_size: 4 dynamic_batching { priority_levels: 2 default_priority_level: 1 preserve_ordering: true }", "preserve_ordering"),
        ("max_batch_size: 4 dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY } }", "DELAY"),
    ],
)  # fmt: skip
def test_contradictions_are_named(text, message):
    with pytest.raises(ServeError) as error:
        made(text)
    assert message in error.value.message


@pytest.mark.parametrize(
    "text, folder, backend",
    [
        ("", "m", "venturi"), ('backend: "onnxruntime"', "m", "venturi"), ('platform: "tensorrt_plan"', "m", "venturi"),
        ("", "m.onnx", "venturi"),
    ],
)  # fmt: skip
def test_backends_of_other_servers_map_to_engines(text, folder, backend):
    assert backend_of(parse_config(text, "c"), folder) == backend


def test_unknown_backends_are_named_with_the_nearest():
    with pytest.raises(ServeError, match="no backend 'onnxruntim'.*onnxruntime"):
        backend_of(parse_config('backend: "onnxruntim"', "c"), "m")


@pytest.mark.parametrize("data", [[], 5, {"max_batch_size": "x"}, {"nope": 1}])
def test_configurations_in_json_are_checked(data):
    with pytest.raises(ServeError):
        config_from_json(data, "json")
