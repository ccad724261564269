// Times MPI collectives for `cargo xtask bench comm`: `mpirun -n RANKS collectives BYTES ITERATIONS`.
// One JSON line an op with the median seconds of an iteration, taken on rank 0 between barriers.
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int rank, ranks;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (argc != 3) MPI_Abort(MPI_COMM_WORLD, 2);
  int piece = (int)(atol(argv[1]) / 4 / ranks), iterations = atoi(argv[2]), whole = piece * ranks;
  float *all = malloc(sizeof(float) * (size_t)whole), *part = malloc(sizeof(float) * (size_t)piece);
  double *seconds = malloc(sizeof(double) * (size_t)iterations);
  for (int i = 0; i < whole; i++) all[i] = 1;
  for (int i = 0; i < piece; i++) part[i] = 1;
  const char *ops[] = {"all_reduce", "all_gather", "reduce_scatter", "broadcast"};
  for (int op = 0; op < 4; op++) {
    for (int i = -1; i < iterations; i++) {
      MPI_Barrier(MPI_COMM_WORLD);
      double start = MPI_Wtime();
      if (op == 0) MPI_Allreduce(MPI_IN_PLACE, all, whole, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
      if (op == 1) MPI_Allgather(part, piece, MPI_FLOAT, all, piece, MPI_FLOAT, MPI_COMM_WORLD);
      if (op == 2) MPI_Reduce_scatter_block(all, part, piece, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
      if (op == 3) MPI_Bcast(all, whole, MPI_FLOAT, 0, MPI_COMM_WORLD);
      if (i >= 0) seconds[i] = MPI_Wtime() - start;
    }
    qsort(seconds, (size_t)iterations, sizeof(double), by_size);
    if (rank == 0) printf("{\"op\":\"%s\",\"seconds\":%e}\n", ops[op], seconds[iterations / 2]);
  }
  MPI_Finalize();
  return 0;
}
