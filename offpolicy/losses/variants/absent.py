"""Published methods that are not here, and why: what ``--model.variant`` answers when it is asked for one."""

from __future__ import annotations

from typing import NamedTuple


class Absent(NamedTuple):
    """A published method that is not here.

    Attributes:
        name: as a variant would be called.
        title: as in the paper.
        paper: its arXiv number; empty where none is known here.
        reason: why it is not here, and what of it is.
    """

    name: str
    title: str
    paper: str
    reason: str


ROWS = (
    Absent("aspo", "ASPO, reasoning with tools", "", "a bonus for calling code early, and answers call no tools"),
    Absent("verl", "VERL, hidden states", "", "advantages by the rank of hidden states, one decomposition per answer"),
    Absent("ares", "ARES", "", "images, and windows of entropy over their texts"),
    Absent(
        "gigpo",
        "GiGPO",
        "2505.10978",
        "groups of equal states of an environment, of which answers have none; the part for them is `trust` 'gigpo', "
        "for a store with the columns `state` and `step_return`",
    ),
    Absent("igpo", "IGPO", "", "rewards for each turn of a search, and engines are asked for one turn"),
    Absent("arpo", "ARPO", "2507.19849", "answers branch where they call tools, and here they call none"),
    Absent("srgpo", "SRGPO, SeeNav", "", "groups of steps in a simulator of navigation"),
    Absent("mars", "MARS", "", "games against the policy itself, turn by turn"),
    Absent("advevo_marl", "AdvEvo-MARL", "", "several agents with roles"),
    Absent("cory", "CORY", "2410.06101", "two policies, of which one sees the answer of the other"),
    Absent("archer", "ArCHer", "2402.19446", "a critic of whole utterances, in a conversation with an environment"),
    Absent("digirl", "DigiRL", "2406.11896", "a model of images and texts that uses a telephone"),
    Absent("craft_gui", "CRAFT-GUI", "", "a model of images and texts that uses a screen"),
)
ABSENT = {row.name: row for row in ROWS}
