"""Names of the environment variables that carry the bearer keys of the services.

Each service reads the same names, so one export serves both sides. Keys travel by environment only:
a command line is readable by every user of the machine.
"""

API_KEY_VARIABLE = "OPENRLHF_ALP_ROLLOUT_API_KEY"
ADMIN_KEY_VARIABLE = "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY"
TOOL_KEY_VARIABLE = "OPENRLHF_ALP_TOOL_API_KEY"
