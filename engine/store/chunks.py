"""Names and descriptions of the chunks of a sequence, as objects of the store."""

from __future__ import annotations

from tandem.engine.model.loader import LoadedModel
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.state import StoreState
from tandem.kvstore.bundle import ChunkSpec
from tandem.kvstore.identity import extend_chain
from tandem.kvstore.interfaces import ObjectKey


class Chunks:
    """Tells for each full chunk of a sequence which object of the store it is."""

    def __init__(self, store: EngineStore, loaded: LoadedModel) -> None:
        self._store = store
        self._model = loaded.config
        self._dtype = str(loaded.dtype).removeprefix("torch.")

    def key(self, sequence: Sequence, state: StoreState, index: int) -> ObjectKey:
        """The key of full chunk `index`; remembers those before it."""
        size = self._store.chunk_tokens
        while len(state.keys) <= index:
            tokens = sequence.tokens[len(state.keys) * size : (len(state.keys) + 1) * size]
            state.keys.append(ObjectKey(extend_chain(state.keys[-1] if state.keys else sequence.root, tokens)))
        return state.keys[index]

    def spec(self, sequence: Sequence, state: StoreState, index: int) -> ChunkSpec:
        """What the object of full chunk `index` has to be."""
        start = index * self._store.chunk_tokens
        return ChunkSpec(
            key=self.key(sequence, state, index),
            namespace=sequence.root,
            tokens=sequence.tokens[start : start + self._store.chunk_tokens],
            start_position=start,
            num_layers=self._model.num_layers,
            num_kv_heads=self._model.num_kv_heads,
            head_dim=self._model.head_dim,
            dtype=self._dtype,
            owner=sequence.request.tenant,
            model=self._store.model,
            provenance=self._store.worker_id,
        )
