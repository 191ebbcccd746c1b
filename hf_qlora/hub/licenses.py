"""The licences of models, as their cards and the Hub state them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_qlora.hub import card
from hf_qlora.hub.errors import TransportError


logger = logging.getLogger(__name__)

FIELDS = ("license", "license_name", "license_link")  # of a card's metadata
_asked: dict[str, dict[str, Any]] = {}  # by the names of the models that the Hub has been asked about


def known(name: str) -> dict[str, Any]:
    """The `FIELDS` of a model or adapter that are known on this machine; `ask` asks the Hub."""
    readme = Path(name, constants.REPOCARD_NAME)
    if not name or name in _asked or not readme.is_file():
        return _asked.get(name, {})
    found = card.load(readme.parent)
    return _fields(found.data) if found is not None else {}


def ask(name: str, hub_id: str | None, token: bool | str | None = None) -> None:
    """Ask the Hub for the licence of a model that is called so here, once."""
    if name in _asked or hub_id is None:
        return
    try:
        found = HfApi(library_name="hf_qlora").model_info(hub_id, token=token).card_data
    except (HfHubHTTPError, TransportError, OfflineModeIsEnabled) as error:
        logger.info("The licence of %s is not known: %s", name, card.one_line(error))
        return
    _asked[name] = _fields(found)


def _fields(data: Any) -> dict[str, Any]:
    if data is None or card.identifier(data.get("license")) is None:
        return {}
    return {name: card.one_line(data.get(name)) for name in FIELDS if data.get(name)}
