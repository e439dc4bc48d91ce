"""What a worker's core is built from, by its settings and its device."""

from __future__ import annotations

from minidisagg.config import WorkerConfig
from minidisagg.core.granularity import parse_granularity
from minidisagg.core.spec import EngineSpec
from minidisagg.model.loader import identity
from minidisagg.runtime.device import Device
from minidisagg.runtime.load import dtype_of
from minidisagg.transfer.codec import codecs_for
from minidisagg.transfer.emulate import Nic
from minidisagg.transfer.kinds import ON_GPUS, ONE_SIDED, efficient_bytes


def engine_spec(config: WorkerConfig, device: Device, kind: str, nic: Nic | None) -> EngineSpec:
    """`kind`: of its links; `nic`: what emulates their interconnect."""
    cache, model = device.cache, device.model
    # What the caches of a cluster hold is computed in any of its dtypes: a store may be another cluster's next.
    computed = sorted({str(dtype_of(one, model.config)) for one in (config.cluster.prefill, config.cluster.decode)})
    checked = config.cluster.gpu_checksums and kind in ON_GPUS  # of pages as they are
    return EngineSpec(
        name=config.name,
        epoch=config.epoch,
        role=config.role,
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        num_layers=model.config.num_layers,
        fingerprint=cache.fingerprint(model.config, f"{identity(model.config.name)} {computed}"),
        policy=config.cluster.policy,
        one_sided_links=kind in ONE_SIDED,
        granularity=parse_granularity(config.cluster.transfer_granularity, efficient_bytes(kind, nic)),
        layer_bytes=cache.bytes_per_page // model.config.num_layers,
        codec=config.cluster.kv_codec,
        codecs=tuple(name for name, one in codecs_for(cache.data).items() if one.in_place or not checked),
        decode_after=config.cluster.decode_after,
        store=bool(config.cluster.kv_store),
        through_store=config.cluster.handoff == "store",
        prefix_caching=config.model.prefix_caching,
        lease=config.run.lease,
        link_timeout=config.run.link_timeout,
        step_deadline=config.run.step_deadline,
        options=config.settings.options(),
    )
