"""Whether a run writes a report."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import OneWaySwitch


@dataclass
class ReportOptions:
    """Report"""

    report: OneWaySwitch = False
    """Write an HTML page about the run beside the trained file; on by itself when samples or validation are."""
    no_report: OneWaySwitch = False
    """Never write the page; overrides --report."""


def report_is_wanted(options: ReportOptions, samples: bool, validation: bool) -> bool:
    """Whether a run with or without sample images and validation writes a report."""
    return not options.no_report and (options.report or samples or validation)
