"""Settings of the services: one definition, read from flags, the environment and one TOML file.

A field `draft_nodes` of the section `verifier` is the flag `--draft-nodes`, the environment variable
SPECSERVE_VERIFIER_DRAFT_NODES and the key `draft_nodes` in the table `[verifier]`. A flag wins over the environment,
the environment over the file, the file over the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from services.common.setting_values import BadValue, element_type, from_text, from_toml, to_text

SECTIONS = ("gateway", "speculator", "up", "verifier")
ENVIRONMENT_PREFIX = "SPECSERVE_"
CONFIG_VARIABLE = "SPECSERVE_CONFIG"

S = TypeVar("S")


class SettingsError(Exception):
    """A setting that is missing, unknown or out of range; the message is one line for the operator."""


def setting(
    help_text: str,
    *,
    default: object = dataclasses.MISSING,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its help text and inclusive bounds; required without a default.

    The return type is Any, as that of dataclasses.field is in effect: it stands where the field's default stands.
    """
    metadata = {"help": help_text, "minimum": minimum, "maximum": maximum}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What every service can be told."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("Least severe lines to log.", default="info")
    log_format: Literal["console", "json"] = setting("Log lines for people or for machines.", default="console")
    metrics_host: str = setting("Address of the Prometheus endpoint.", default="127.0.0.1")
    metrics_port: int = setting(
        "Port of the Prometheus endpoint /metrics; 0 serves none.", default=0, minimum=0, maximum=65535
    )
    drain_timeout_s: float = setting("Seconds that open work may take to end after SIGTERM.", default=30.0, minimum=0)
    tls_cert: Path | None = setting(
        "This service's certificate, PEM: shown to the other services, which check it against their --tls-ca.",
        default=None,
    )
    tls_key: Path | None = setting("The key of the certificate, PEM, not encrypted.", default=None)
    tls_ca: Path | None = setting(
        "Certificates of the authority, PEM: other services must show a certificate that it signed.", default=None
    )
    insecure: bool = setting(
        "Run without TLS between the services: whoever reaches them can use them and read along. For one machine.",
        default=False,
    )

    def __post_init__(self) -> None:
        files = {"--tls-cert": self.tls_cert, "--tls-key": self.tls_key, "--tls-ca": self.tls_ca}
        given = [flag for flag, path in files.items() if path is not None]
        missing = [flag for flag, path in files.items() if path is None]
        if self.insecure and given:
            raise SettingsError(f"both --insecure and {given[0]} are given; give --insecure or certificates")
        if not self.insecure and not given:
            raise SettingsError(
                "no certificates: give --tls-cert, --tls-key and --tls-ca, or --insecure to run without TLS between "
                "the services"
            )
        if given and missing:
            raise SettingsError(f"{given[0]} is given without {' and '.join(missing)}; TLS needs all three files")


@dataclass(frozen=True)
class Field:
    """One setting of a section, with its resolved type."""

    name: str
    annotation: object
    help_text: str
    default: object
    minimum: float | None
    maximum: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def bounds(self) -> str:
        """The range as text, empty when open on both sides."""
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"at least {self.minimum:g}"
        return "" if self.maximum is None else f"at most {self.maximum:g}"


def fields_of(cls: type) -> Iterator[Field]:
    """The settings that a settings class defines, in order, those of its base classes first."""
    annotations = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        yield Field(
            name=field.name,
            annotation=annotations[field.name],
            help_text=meta["help"],
            default=field.default,
            minimum=meta["minimum"],
            maximum=meta["maximum"],
        )


def variable(section: str, name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{section}_{name}".upper()


def load_settings(
    cls: type[S],
    section: str,
    *,
    flags: Mapping[str, object] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> S:
    """Settings of one section.

    flags: values by field name: text, a list of texts for a list, bool for a switch; None where no flag was given.
    config: the TOML file; without it, the file that SPECSERVE_CONFIG names, if any.
    environ: the process's own environment when None. This is the one place that reads it.

    Raises:
        SettingsError: an unknown key, a bad or missing value, an unreadable file.
    """
    environ = os.environ if environ is None else environ
    fields = list(fields_of(cls))
    names = [field.name for field in fields]
    table = _read_table(_config_file(config, environ), section)
    for name in table:
        if name not in names:
            raise SettingsError(f"--config: unknown key {name!r} in [{section}]; {_suggest(name, names)}")
    _refuse_unknown_variables(environ, section, names)
    values: dict[str, object] = {}
    for field in fields:
        flag = (flags or {}).get(field.name)
        if flag is not None:
            values[field.name] = _checked(field, flag, field.flag, _from_flag)
        elif (text := environ.get(variable(section, field.name))) is not None:
            values[field.name] = _checked(field, text, variable(section, field.name), _from_environment)
        elif field.name in table:
            values[field.name] = _checked(field, table[field.name], f"{field.name} in [{section}]", from_toml)
        elif field.default is dataclasses.MISSING:
            raise SettingsError(
                f"{section}: {field.flag} is missing ({field.help_text.rstrip('.')}); give the flag, set "
                f"{variable(section, field.name)}, or write {field.name} into [{section}] of the --config file"
            )
    return cls(**values)


def given_settings(section: str, config: Path | None, environ: Mapping[str, str] | None = None) -> frozenset[str]:
    """The names that the environment and the file give values to in a section, known to it or not."""
    environ = os.environ if environ is None else environ
    prefix = variable(section, "")
    in_environment = {name.removeprefix(prefix).lower() for name in environ if name.startswith(prefix)}
    return frozenset(in_environment | _read_table(_config_file(config, environ), section).keys())


def to_flags(values: Mapping[str, object]) -> list[str]:
    """Command-line arguments that give these fields these values; fields that are None are left out."""
    arguments: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            arguments += [f"--{flag}={to_text(element)}" for element in value]
        elif value is not None:
            arguments.append(f"--{flag}={to_text(value)}")
    return arguments


def _from_flag(value: object, annotation: object) -> object:
    if isinstance(value, bool):
        return value
    element = element_type(annotation)
    if element is None:
        return from_text(str(value), annotation)
    if not isinstance(value, tuple | list):
        raise TypeError(f"the flag of a list carries a list, not {value!r}")
    return tuple(from_text(str(part), element) for part in value)


def _from_environment(value: object, annotation: object) -> object:
    return from_text(str(value), annotation)


def _checked(field: Field, raw: object, key: str, convert: Any) -> object:
    try:
        value: object = convert(raw, field.annotation)
    except BadValue as error:
        raise SettingsError(f"{key}: got {raw!r}; {error}") from None
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            below = field.minimum is not None and not number >= field.minimum
            above = field.maximum is not None and not number <= field.maximum
            if below or above:
                raise SettingsError(f"{key}: got {number}; allowed: {field.bounds()}")
    return value


def _config_file(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    return Path(environ[CONFIG_VARIABLE]) if config is None and environ.get(CONFIG_VARIABLE) else config


def _read_table(config: Path | None, section: str) -> dict[str, object]:
    if config is None:
        return {}
    try:
        document = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {config}: cannot read it: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config {config}: not TOML: {error}") from None
    for name, value in document.items():
        if name not in SECTIONS or not isinstance(value, dict):
            allowed = ", ".join(f"[{known}]" for known in SECTIONS)
            raise SettingsError(f"--config {config}: unknown key {name!r} at the top; allowed: the tables {allowed}")
    table: dict[str, object] = document.get(section, {})
    return table


def _refuse_unknown_variables(environ: Mapping[str, str], section: str, names: list[str]) -> None:
    # A Kubernetes service link of a Service named specserve-verifier also writes SPECSERVE_VERIFIER_*; such pods set
    # enableServiceLinks: false.
    prefix = variable(section, "")
    for name in sorted(environ):
        if name.startswith(prefix) and (key := name.removeprefix(prefix).lower()) not in names:
            raise SettingsError(f"unknown environment variable {name}; {_suggest(key, names)}")


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names)}"
