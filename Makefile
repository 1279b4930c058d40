# Every target sets up first; set-up is quick when nothing changed.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $(p))))
BIN := .venv/bin
DEMO_RUNS := $(addprefix scenes-,$(addsuffix -s0,gear joint-naive joint-straight-through llamagen-repa-control llamagen-repa))
DEMO_FIGURES := pictures probe runs tour train fig2_method fig3_training_dynamics fig4_codebook_usage fig5_generator_alignment tab2_3_text_to_image tab4_tokenizer_alignment bridges protocols
# methods that the demo leaves out of its figures, so that it ends within 12 minutes
DEMO_WITHOUT := -p half "" -p naive_inputs "" -p no_gan ""
REFERENCE_RUNS := $(foreach s,0 1 2,$(DEMO_RUNS:-s0=-s$(s)) $(addprefix scenes-,$(addsuffix -s$(s),joint-naive-inputs joint-no-gan llamagen-repa-half llamagen)))
SCORED_RUNS := $(foreach s,0 1 2,$(addprefix scenes-,$(addsuffix -s$(s),joint gear llamagen llamagen-repa llamagen-repa-control)))
TOKENIZER_RUNS := $(foreach s,0 1 2,scenes-tokenizer-s$(s) scenes-control-s$(s))
# the headline methods at the settled schedule, five seeds: the reference of the results
SETTLED := $(foreach s,0 1 2 3 4,$(addprefix scenes-settled-,$(addsuffix -s$(s),joint llamagen-repa gear llamagen-repa-control llamagen-repa-half joint-naive-inputs naive-inputs llamagen joint-no-init)))
STUDIES := temperature weight components tokenizer size depth initialisation
# By default glibc returns large blocks to the system at once and pages them in again, which takes half
# the time of a feature network on a CPU.
KEEP := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
DEMO := $(KEEP) GEAR_RUNS=$(CURDIR)/runs/demo GEAR_FIGURES=$(CURDIR)/figures/demo
AGAIN := GEAR_RUNS=$(CURDIR)/runs/again GEAR_FIGURES=$(CURDIR)/figures/again
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo figures reference test test-slow bench gpu lab lint strip teacher detector
.DEFAULT_GOAL := setup

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "gear needs Python 3.11 or 3.12 on the PATH (or: make setup PYTHON=/path/to/python)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,effnet,teachers,scale]"
	@touch $@

demo: setup  ## trains seed 0 of every run the figures need, under runs/demo, and draws figures/demo
	$(DEMO) $(BIN)/python -m gear train $(DEMO_RUNS) --jobs 2
	$(DEMO) $(BIN)/python -m gear figures $(DEMO_FIGURES) --seeds 0 --jobs 2 $(DEMO_WITHOUT)
	$(DEMO) $(BIN)/python -m gear claims

figures: setup  ## redraws figures/ from the records in runs/reference; FORCE=1 redraws what is up to date too
	$(BIN)/python -m gear figures --jobs 2 $(if $(FORCE),--force)
	$(BIN)/python -m gear claims --out docs/results.md

reference: setup  ## trains and scores everything in runs/reference again, three seeds, under runs/again, and packs it
	@echo "This takes six to seven hours on two cores (an estimate); it writes runs/again, then runs/reference."
	$(AGAIN) $(BIN)/python -m gear train $(REFERENCE_RUNS) --jobs 2 --keep 9
	$(AGAIN) $(BIN)/python -m gear train $(SETTLED) --jobs 2 --keep 9 --cached
	$(AGAIN) $(BIN)/python -m gear evaluate $(SETTLED) --both --quiet
	$(AGAIN) $(BIN)/python -m gear evaluate $(SETTLED) --steps 600 1200 1800 --quiet
	$(AGAIN) $(BIN)/python -m gear evaluate $(SETTLED) --sweep cfg_scale=1.5,2,3,5 --quiet
	$(AGAIN) $(BIN)/python -m gear evaluate $(SETTLED) --steps 600 1200 1800 --cfg-scale 3 --quiet
	$(AGAIN) $(BIN)/python -m gear evaluate $(TOKENIZER_RUNS) --network scenes --reconstruction
	for study in $(STUDIES); do $(AGAIN) $(BIN)/python -m gear sweep $$study || exit 1; done
	$(AGAIN) $(BIN)/python -m gear evaluate $(SCORED_RUNS) --both --steps 50 100 150 200
	$(AGAIN) $(BIN)/python -m gear evaluate $(SCORED_RUNS) --sweep cfg_scale=1,1.25,1.5,1.75,2
	$(AGAIN) $(BIN)/python -m gear evaluate 'scenes-joint-*-size-*' 'scenes-llamagen-repa-*-size-*' --sweep cfg_scale=1,1.5
	$(AGAIN) $(BIN)/python -m gear figures --jobs 2
	$(AGAIN) $(BIN)/python -m gear pack runs/reference 'scenes-*' --panels 'scenes-joint*-s0'
	$(AGAIN) $(BIN)/python -m gear pack runs/reference 'scenes-settled-*' --add --panels 'scenes-settled-*-s0'

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

bench: setup  ## times our code beside other libraries or plain versions; writes benchmarks/*.csv
	for benchmark in evaluation readout analysis step resume; do $(BIN)/python benchmarks/$$benchmark.py || exit 1; done

lab: setup  ## JupyterLab on the notebooks, with the runs of the demo
	GEAR_RUNS=$(CURDIR)/runs/demo GEAR_FIGURES=$(CURDIR)/figures/demo $(BIN)/jupyter lab notebooks

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

strip: setup  ## removes outputs and counts from the notebooks
	$(BIN)/nbstripout notebooks/*/*.ipynb

teacher: setup  ## trains and packages the scenes teacher: about 3 minutes
	$(BIN)/python -m gear train teacher-scenes
	$(BIN)/python -m gear package teacher-scenes

detector: setup  ## trains and packages the scenes detector, the judge of samples: about 10 minutes
	$(BIN)/python -m gear train detector-scenes
	$(BIN)/python -m gear package detector-scenes

gpu:  ## checks, benchmarks and a training run on a GPU, in ten minutes; dry run on a CPU: make gpu GPU="--quick --device cpu"
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu.py $(GPU)
