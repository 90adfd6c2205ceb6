"""All cases of bad input."""

from __future__ import annotations

import cases_command_line
import cases_data
import cases_export
import cases_grids
import cases_judges
import cases_models
import cases_options
import cases_sweeps

AREAS = (
    *(cases_command_line, cases_grids, cases_options, cases_data, cases_models, cases_judges, cases_sweeps),
    cases_export,
)
CASES = [case for area in AREAS for case in area.CASES]
