cd /tmp/pt; rm -rf out
M=/tmp/pt/src/nnUNetTrainer__nnUNetPlans__3d_fullres
export OMP_NUM_THREADS=2
exec $PRE /work/main/.venv/bin/python /work/main/predict.py model=nnunet "model.parts=[{folder: $M, labels: {1: 1, 2: 2}},{folder: $M, labels: {1: 3, 2: 4}}]" data.inputs=/tmp/pt/src/images output_dir=/tmp/pt/out "model.flips=[]" trainer=cpu logger=null run.log=plain
