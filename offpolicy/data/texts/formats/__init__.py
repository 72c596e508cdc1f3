"""What rows of texts mean: which columns are prompts and answers, how they are written, and which rows are faulty.

The format is decided from the columns and a scan of all rows, never from the first one, and a person is told what was
decided. A missing column or a wrong type stops the load; a row that carries no signal, or a wrong signal, is a fault
that stops the load too or, on request, is dropped and counted.

A format has a kind of answers (a class in ``kinds``) and a style of prompts (a class in ``prompts``); a new kind or
style is one class there, with a line in the list of its file.
"""

from offpolicy.data.texts.formats.columns import scan
from offpolicy.data.texts.formats.detection import detect
from offpolicy.data.texts.formats.faults import Faults
from offpolicy.data.texts.formats.form import Format
from offpolicy.data.texts.formats.rows import records
from offpolicy.data.texts.formats.source import Record, Source
from offpolicy.data.texts.formats.values import template_options

__all__ = ["Faults", "Format", "Record", "Source", "detect", "records", "scan", "template_options"]
