"""One training step of a whole model beside the planner's: `hybridsp bench step`.

`command` takes the steps of each `case`, on `data`; `options` says which cases there are, `profile`
what a step's time goes into, `longest` how long sequences can be, `report` shows it all.
"""
