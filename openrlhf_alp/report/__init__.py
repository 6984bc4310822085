"""From a run folder to tables and plots. Reads files only, also while a run still trains."""
