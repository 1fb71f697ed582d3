"""A vLLM of a few lines, laid out where the fork server looks, whose server is the tiny engine."""

from __future__ import annotations

from pathlib import Path

import tiny_engine

MODULES = {
    "vllm": "import os\nREAD = os.environ.get('FAKE_VLLM_READS')\n",
    "vllm.entrypoints": "",
    "vllm.entrypoints.launchers": "",
    "vllm.entrypoints.launchers.api_server": "",
    "vllm.entrypoints.launchers.api_server.entry": """
import sys
def main():
    from vllm.v1.worker.gpu_worker import Worker
    Worker().load_model()
    sys.path.insert(0, {support!r})
    import tiny_engine
    sys.exit(tiny_engine.main())
""",
    "vllm.engine": "",
    "vllm.engine.arg_utils": "class AsyncEngineArgs:\n    def create_engine_config(self): pass\n",
    "vllm.platforms": "class Platform: pass\ncurrent_platform = Platform()\n",
    "vllm.model_executor": "",
    "vllm.model_executor.model_loader": "",
    "vllm.model_executor.model_loader.default_loader": """
class DefaultModelLoader:
    def load_weights(self): print('loading weights', flush=True)
""",
    "vllm.model_executor.models": "",
    "vllm.model_executor.models.registry": "class ModelRegistry:\n    models = {{}}\n",
    "vllm.utils": "",
    "vllm.utils.system_utils": "def get_mp_context(): pass\n",
    "vllm.v1": "",
    "vllm.v1.engine": "",
    "vllm.v1.engine.async_llm": "",
    "vllm.v1.engine.coordinator": "def get_mp_context(): pass\n",
    "vllm.v1.engine.core": "class EngineCore:\n    def __init__(self): pass\n",
    "vllm.v1.engine.utils": "def get_mp_context(): pass\n",
    "vllm.v1.executor": "",
    "vllm.v1.executor.multiproc_executor": """
import vllm.v1.engine.coordinator, vllm.v1.engine.utils, vllm.utils.system_utils
def get_mp_context(): pass
class WorkerProc:
    @staticmethod
    def worker_main(): pass
""",
    "vllm.v1.worker": "",
    "vllm.v1.worker.cpu_worker": "",
    "vllm.v1.worker.cpu_model_runner": "",
    "vllm.v1.worker.gpu_model_runner": "",
    "vllm.v1.worker.utils": "",
    "vllm.v1.worker.gpu_worker": """
class Worker:
    def load_model(self):
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        DefaultModelLoader().load_weights()
""",
}


def make(directory: Path, *, without: str = "") -> Path:
    """Write it below ``directory``, which belongs on ``PYTHONPATH``; returns that."""
    support = str(Path(tiny_engine.__file__).parent)
    for name, text in MODULES.items():
        if name == without:
            continue
        place = directory.joinpath(*name.split("."))
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(text.format(support=support))
    return directory
