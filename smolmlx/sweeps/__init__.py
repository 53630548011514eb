"""One recipe under many settings and seeds: what to run (`definition`), what was run (`record`), what it shows (`table`)."""
