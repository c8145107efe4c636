"""What `tandem serve` finds out before it starts processes, so that a mistake is one line, not one per process."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tandem.common.checkpoint import resolve_model
from tandem.common.errors import ConfigError
from tandem.common.memory import readable_size, usable_memory
from tandem.engine.settings import CPU_POOL_BYTES
from tandem.runtime.devices import may_use_gpu
from tandem.runtime.processes import served_name
from tandem.runtime.settings import ServeConfig

CHECK_CPU_S = 120
"""Processor time in which a folder is checked, but for its weights. The largest tokenizers take a few seconds."""


def checked(config: ServeConfig) -> ServeConfig:
    """The settings with the model's folder in place of a hub id, which is fetched once for all processes.

    Raises ConfigError.
    """
    _check_memory(config)
    if not Path(config.model_folder).exists():
        from tandem.common.telemetry import set_up_logging

        set_up_logging("serve", config.log_level)  # a download says how far it is
    folder = resolve_model(config.model_folder)
    resolved = replace(config, model=str(folder), served_model_name=served_name(config))
    in_a_fork(lambda: _check_model(resolved, folder))
    return resolved


def in_a_fork(check: Callable[[], None]) -> None:
    """Runs `check` in a process that ends with it: what it loads would stay in this one for good. Raises the
    ConfigError that it raises. Call it before there are threads."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(read_end)
            resource.setrlimit(resource.RLIMIT_CPU, (CHECK_CPU_S, CHECK_CPU_S))
            check()
            status = 0
        except ConfigError as error:
            os.write(write_end, str(error).encode(errors="backslashreplace"))
        except MemoryError:
            os.write(write_end, b"the model's folder needs more memory to be read than there is")
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        message = pipe.read().decode()
    _, status = os.waitpid(process, 0)
    if message:
        raise ConfigError(message)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        raise ConfigError(
            f"the model's folder cannot be read within {CHECK_CPU_S} s and the memory there is: its tokenizer.json or "
            "chat template takes too long"
        )
    if status:
        raise ConfigError("the model's folder could not be checked; the reason is above")


def _check_model(config: ServeConfig, folder: Path) -> None:
    from tandem.engine.model.config import ModelConfig
    from tandem.router.settings import FrontDoorSettings, RouterConfig
    from tandem.router.tenants.tenants import Tenants
    from tandem.router.text.served_model import ServedModel

    ModelConfig.from_folder(folder)
    front = config.part(FrontDoorSettings)
    router = RouterConfig(model=config.model, served_model_name=config.served_model_name, **front)  # type: ignore[arg-type]
    ServedModel.load(router)
    Tenants.open(config.tenants_file, config.api_keys_file, api_keys=config.api_key)


def _check_memory(config: ServeConfig) -> None:
    """KV pools fill up with cached prompts sooner or later, so together they must fit. `runtime/devices.py` sees
    to a GPU's memory."""
    if may_use_gpu(config.device):
        return
    workers = config.prefill + config.decode
    pools = workers * (config.kv_cache_bytes or CPU_POOL_BYTES)
    store = 0 if config.kv_store_socket else config.kv_host_bytes
    usable = usable_memory()
    if pools + store > usable:
        raise ConfigError(
            f"kv_cache_bytes of {workers} workers ({readable_size(pools)} together) and kv_host_bytes "
            f"({readable_size(store)}) are more than the memory there is ({readable_size(usable)}); give less"
        )
