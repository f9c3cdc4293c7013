"""Model configurations: config.pbtxt as the protobuf text it is, checked, completed and normalised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from tritonclient.grpc import model_config_pb2 as pb

from venturi.core.registry import nearest
from venturi.serve.errors import invalid
from venturi.serve.tensors import BYTES

ModelConfig = Any  # pb.ModelConfig: generated without types

# Platform and backend names that clients of other servers write, and the kind of model that takes them here.
BACKENDS = {
    "venturi": "venturi", "tensorrt": "venturi", "tensorrt_plan": "venturi", "onnxruntime": "venturi",
    "onnxruntime_onnx": "venturi", "onnx": "venturi", "python": "python",
    "pytorch": "venturi", "pytorch_libtorch": "venturi",
    "ort": "ort", "ensemble": "ensemble",
}  # fmt: skip
DEFAULT_SEQUENCE_IDLE_US = 1_000_000


def parse_config(text: str, where: str) -> ModelConfig:
    """Raises ServeError with the line and column of a syntax error or an unknown field."""
    config = pb.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as exc:
        raise invalid(f"cannot read the model configuration {where}: {exc}") from exc
    return config


def read_config(path: Path) -> ModelConfig:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise invalid(f"cannot read the model configuration {path}: {exc}") from exc
    return parse_config(text, str(path))


def config_from_json(data: object, where: str) -> ModelConfig:
    if not isinstance(data, dict):
        raise invalid(f"{where}: expected a JSON object, got {type(data).__name__}")
    try:
        return ParseDict(data, pb.ModelConfig())
    except (ParseError, RecursionError) as exc:
        raise invalid(f"{where}: {exc}") from exc


def message_json(message: Any) -> dict[str, Any]:
    """Field names as in the .proto, default numbers and strings included, 64-bit numbers as numbers."""
    out: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value_field = field.message_type.fields_by_name["value"]
            out[field.name] = {str(k): _json(v, value_field) for k, v in getattr(message, field.name).items()}
        elif field.is_repeated:
            out[field.name] = [_json(v, field) for v in getattr(message, field.name)]
        elif not field.has_presence or message.HasField(field.name):
            out[field.name] = _json(getattr(message, field.name), field)
    return out


def _json(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return message_json(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return field.enum_type.values_by_number[value].name
    return value.decode("latin-1") if isinstance(value, bytes) else value


def datatype(data_type: int) -> str:
    """TYPE_FP32 (as a number) -> FP32; strings are BYTES on the wire."""
    name = pb.DataType.Name(data_type).removeprefix("TYPE_")
    return BYTES if name == "STRING" else name


def data_type(name: str) -> int:
    return int(pb.DataType.Value("TYPE_STRING" if name == BYTES else f"TYPE_{name}"))


def backend_of(config: ModelConfig, folder: str) -> str:
    """The kind of model: `backend`, else `platform`, else the suffix of the folder's name."""
    if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
        given = "ensemble"
    else:
        given = config.backend or config.platform
        suffix = folder.rpartition(".")[2] if "." in folder else ""
        given = given or (suffix if suffix in BACKENDS else "venturi")
    if given not in BACKENDS:
        raise invalid(f"model '{config.name or folder}': no backend '{given}'; known: {', '.join(sorted(BACKENDS))}."
                      f"{nearest(given, sorted(BACKENDS))}")  # fmt: skip
    return BACKENDS[given]


def normalise(config: ModelConfig, folder: str, *, backend: str) -> ModelConfig:
    """A copy with the defaults written out. Raises ServeError for what contradicts itself."""
    out = pb.ModelConfig()
    out.CopyFrom(config)
    if out.name and out.name != folder:
        raise invalid(
            f"unexpected directory name '{folder}' for model '{out.name}', directory name must equal model name"
        )
    out.name = folder
    if not out.backend and not out.platform:
        out.backend = backend
    latest = out.version_policy.HasField("latest") and not out.version_policy.latest.num_versions
    if latest or not out.HasField("version_policy"):
        out.version_policy.latest.num_versions = 1
    if not out.instance_group and not out.HasField("ensemble_scheduling"):
        out.instance_group.add()
    for i, group in enumerate(out.instance_group):
        group.name = group.name or (f"{folder}_{i}" if i else folder)
        group.count = group.count or 1
        if group.kind == pb.ModelInstanceGroup.KIND_AUTO:
            group.kind = pb.ModelInstanceGroup.KIND_GPU if group.gpus else pb.ModelInstanceGroup.KIND_CPU
    if out.HasField("sequence_batching"):
        idle = out.sequence_batching.max_sequence_idle_microseconds
        out.sequence_batching.max_sequence_idle_microseconds = idle or DEFAULT_SEQUENCE_IDLE_US
    if out.HasField("dynamic_batching") and not out.dynamic_batching.preferred_batch_size and out.max_batch_size:
        out.dynamic_batching.preferred_batch_size.append(out.max_batch_size)
    _validate(out)
    return out


def _validate(config: ModelConfig) -> None:
    name = config.name
    if config.max_batch_size < 0:
        raise invalid(f"'max_batch_size' must be non-negative for {name}, got {config.max_batch_size}")
    for group in config.instance_group:
        if group.kind in (pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_MODEL) and group.gpus:
            raise invalid(f"instance group {group.name} of model {name} has kind "
                          f"{pb.ModelInstanceGroup.Kind.Name(group.kind)} but lists gpus")  # fmt: skip
        if group.count < 1:
            raise invalid(f"instance group {group.name} of model {name} has count {group.count}, expected at least 1")
    for kind, tensors in (("input", config.input), ("output", config.output)):
        seen: set[str] = set()
        for t in tensors:
            if not t.name:
                raise invalid(f"model {kind} must specify 'name' for {name}")
            if t.name in seen:
                raise invalid(f"model {kind} '{t.name}' is listed twice for {name}")
            seen.add(t.name)
            if t.data_type == pb.TYPE_INVALID:
                raise invalid(f"model {kind} '{t.name}' must specify 'data_type' for {name}")
            if any(d < -1 or d == 0 for d in t.dims):
                raise invalid(f"model {kind} '{t.name}' has dims {list(t.dims)} for {name}; expected -1 or positive")
    if config.HasField("ensemble_scheduling") and config.instance_group:
        raise invalid(f"instance group should not be specified for ensemble '{name}'")
    if config.HasField("sequence_batching"):
        _validate_sequences(config)
    _validate_cache(config)
    latency_target_us(config)
    if config.HasField("dynamic_batching"):
        _validate_batching(config)


def _validate_cache(config: ModelConfig) -> None:
    if not config.response_cache.enable:
        return
    for reason, holds in (
        ("sequence batching", config.HasField("sequence_batching")),
        ("a decoupled transaction policy", config.model_transaction_policy.decoupled),
    ):
        if holds:
            raise invalid(f"response cache is not available for model {config.name}, which has {reason}")


def _validate_sequences(config: ModelConfig) -> None:
    name, batching = config.name, config.sequence_batching
    if not 0 <= batching.direct.minimum_slot_utilization <= 1:
        raise invalid(f"sequence batching minimum_slot_utilization must be in range [0.0, 1.0] for {name}, "
                      f"got {batching.direct.minimum_slot_utilization}")  # fmt: skip
    if batching.HasField("oldest") and batching.oldest.max_candidate_sequences < 1:
        raise invalid(f"sequence batching max_candidate_sequences must be at least 1 for {name}")
    names = [c.name for c in batching.control_input] + [s.input_name for s in batching.state]
    names += [t.name for t in config.input]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise invalid(f"model {name}: inputs {twice} are both controls or states and inputs")


def latency_target_us(config: ModelConfig) -> int | None:
    """Microseconds that answers should take, of a model with the parameter max_queue_delay "auto"; else None.

    Raises ServeError for other values, and for a target that is missing, malformed or without a use.
    """
    given = {k: config.parameters[k].string_value for k in ("max_queue_delay", "latency_target_us")
             if k in config.parameters}  # fmt: skip
    if not given:
        return None
    name, target = config.name, given.get("latency_target_us", "")
    if given.get("max_queue_delay") != "auto":
        raise invalid(f"model {name}: parameter max_queue_delay must be 'auto' to go with a latency_target_us, "
                      f"got {given.get('max_queue_delay')!r}")  # fmt: skip
    if not target.isdigit() or not int(target):
        raise invalid(f"model {name}: parameter latency_target_us must be positive microseconds, got {target!r}")
    if not config.HasField("dynamic_batching") or config.dynamic_batching.max_queue_delay_microseconds:
        raise invalid(f"model {name}: max_queue_delay 'auto' needs dynamic_batching without "
                      "max_queue_delay_microseconds")  # fmt: skip
    return int(target)


def _validate_batching(config: ModelConfig) -> None:
    name, batching = config.name, config.dynamic_batching
    for size in batching.preferred_batch_size:
        if size < 1 or size > config.max_batch_size:
            raise invalid(
                f"dynamic batching preferred size must be between 1 and max_batch_size for {name}, got {size}"
            )
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels and not 1 <= default <= levels:
        raise invalid(f"default priority level {default} must be in [1, {levels}] for {name}")
    if not levels and (default or batching.priority_queue_policy):
        raise invalid(f"priority settings need 'priority_levels' for {name}")
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            raise invalid(f"queue policy for priority level {level} must be in [1, {levels}] for {name}")
    if batching.preserve_ordering:
        policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
        if levels > 1:
            raise invalid(f"only one priority level is allowed when 'preserve_ordering' is true for {name}")
        if any(p.timeout_action == pb.ModelQueuePolicy.DELAY for p in policies):
            raise invalid(
                f"queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {name}"
            )
