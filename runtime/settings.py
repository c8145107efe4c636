"""Settings of `tandem serve`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from tandem.common.checkpoint import BUNDLED_MODEL
from tandem.common.errors import ConfigError
from tandem.common.settings import Group
from tandem.engine.settings import EngineConfig
from tandem.kvstore.settings import StoreSettings
from tandem.router.settings import FrontDoorSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(FrontDoorSettings, StoreSettings, EngineConfig):
    """The whole platform on this machine. Settings of an engine go to every worker, those of the store to one store
    node that all of them share, those of the front door to the router."""

    basics: ClassVar[Group]
    model: str = ""
    """A folder in Hugging Face format, or a hub id (OWNER/NAME). Empty: the small model that comes with the project."""
    prefill: int = 1
    """Prefill workers. 0: decode workers compute prompts themselves."""
    decode: int = 1
    """Decode workers."""

    store: ClassVar[Group]
    kv_store_socket: str = ""
    """Unix path of a store node that runs on this host already. Empty: `tandem serve` runs one."""
    kv_host_bytes: int = 512 << 20
    """Host memory of the store node; taken as it fills. 0: no store node."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # zero-argument super() does not work in a slotted dataclass
        StoreSettings.__post_init__(self)
        FrontDoorSettings.__post_init__(self)
        if self.decode < 1:
            raise ConfigError(f"--decode {self.decode}: at least one decode worker is needed")
        if self.prefill < 0:
            raise ConfigError(f"--prefill {self.prefill}: must not be negative")

    @property
    def model_folder(self) -> str:
        return self.model or str(BUNDLED_MODEL)

    @property
    def needs_key(self) -> bool:
        return bool(self.api_key or self.api_keys_file or self.tenants_file)

    def part(self, of: type) -> dict[str, object]:
        """The fields of a class that this one is made of, as a child's configuration file has them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(of)}
