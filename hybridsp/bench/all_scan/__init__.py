"""Every All-Scan algorithm against the wire: `hybridsp bench all-scan`.

`command` measures the `cases`; `cost_model` fits each algorithm's link to them and says what it
means for more ranks.
"""
